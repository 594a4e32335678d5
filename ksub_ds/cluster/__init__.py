"""How several machines start a run, watch it, and start it again."""
