"""What may be asked for: the blocks of a job file, their checks, and the jobs that a sweep is made of."""
