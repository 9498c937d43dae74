"""From a checkpoint to the Hub: its card, what of it is sent, and the push."""
