"""Train the routers of an upscaled checkpoint on inputs without labels."""
