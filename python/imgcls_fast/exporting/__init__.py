"""From a bundle to files that other runtimes load; every file is compared with the original before it is handed out."""
