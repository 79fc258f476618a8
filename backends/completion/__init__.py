"""`doherty completion`: scripts by which shells complete the command, made from its own parser."""
