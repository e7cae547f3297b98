"""A synthetic world of moving shapes, and a small Wan that was trained on it: generator, scorer, trainer."""
