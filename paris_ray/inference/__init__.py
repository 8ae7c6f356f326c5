"""From experts to pictures: loading, the step-level batching engine."""
