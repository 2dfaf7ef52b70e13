"""Turn held-out labels and predicted probabilities into figures of merit, intervals and plots."""
