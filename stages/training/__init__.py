"""Parts of every training run: learner, states, ranks, optimiser, validation, launching."""
