"""From example prompts to a router."""
