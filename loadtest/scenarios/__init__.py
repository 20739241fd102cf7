"""Load tests with locust: what is asked of the service (``scenario``), by whom (``users``), and what came of it."""
