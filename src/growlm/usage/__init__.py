"""Usage: which experts are chosen or retrieved on a text, counted and drawn. Changes nothing."""
