"""Dense merges, the baselines that an upscaled model must beat."""
