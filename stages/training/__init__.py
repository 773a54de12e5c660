"""What all training runs share: learner, states, ranks, optimiser, validation, launching."""
