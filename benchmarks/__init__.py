"""How fast, and where the time goes. Every comparison is made in one process."""
