"""Feature tables → networks that predict disease, and what they are compared with."""
