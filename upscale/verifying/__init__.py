"""Is a checkpoint what it should be? Its bytes, its structure, two engines, and the models that it was built from."""
