"""The benchmark of QSM: one matrix of algorithm x task x seed, and a report in which every number has a source."""
