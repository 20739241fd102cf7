"""A seeded simulation of the whole protocol in virtual time: real scripts, real steps, simulated servers and faults."""
