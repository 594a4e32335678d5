"""Starting a run on several machines, watching it, and starting it again."""
