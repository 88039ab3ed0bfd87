"""Text environments whose best return is computed exactly: a maze, a charity talk, twenty questions.

Each module has the environment, the `rows()` that an evaluation plays, `optimum()` and `random_return()` over those rows,
`best_action(history)` that reaches the optimum, and `logs(count, seed)` of a mediocre behaviour policy.
"""
