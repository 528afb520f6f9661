"""One file per family: the equation, the parameters, ready-made mods, and an independent naive reference."""
