"""What becomes of a finished checkpoint: experts added, removed, or taken out as models of their own."""
