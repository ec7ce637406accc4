"""What happens while something runs: events, and the sinks that show or store them."""
