"""Cluster: many learnings, here or on machines of a Ray cluster. Knows plans and processes; trains nothing itself."""
