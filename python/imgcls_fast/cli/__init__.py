"""The command line: a thin shell over `imgcls_fast.api`. `app.main` is the console script."""
