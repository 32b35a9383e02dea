"""Models over several processes: tensor parallelism (plan, vocabulary, whole weights) and context parallelism."""
