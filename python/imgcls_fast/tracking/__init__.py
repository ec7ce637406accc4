"""Events of what happens while something runs, and the sinks that show or store them."""
