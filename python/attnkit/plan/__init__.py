"""From a program to what a backend runs: the printers of expressions."""
