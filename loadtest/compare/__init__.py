"""What voucherd is measured against: the same job, written as one writes it in a common framework."""
