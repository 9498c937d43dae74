"""The Hub: models pushed and pulled, their licences, and one clear error for whatever it answers."""
