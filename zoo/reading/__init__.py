"""Read models as they lie on disk or on the Hub: headers first, one tensor at a time."""
