"""Real processes under faults: what clients were told is compared with what the stores say.

    client    asks, and writes down every call and every answer         (a process of its own)
    stage     the servers, `voucherd serve` and `work`, and what is between them
    faults    what goes wrong, and how it is mended
    nemesis   chooses faults by its seed
    evidence  what the stores say after everything is healed and drained
    checker   the promises, by answers and evidence; pure
    report    what happened, for people and as JSON

``python -m tests.chaos`` does everything at random; each row of the table of faults has a test of its own here.
"""
