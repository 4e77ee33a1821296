"""One learner over several processes: sharded weights, shared experts, and recomputation, from outside the model."""
