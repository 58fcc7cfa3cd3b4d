"""The commands' options; what they do is in `commands`, whose modules have the same names. Loads no torch."""
