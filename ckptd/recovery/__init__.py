"""How a job comes back: the rungs and their prices, who takes which ranks, and the plan."""
