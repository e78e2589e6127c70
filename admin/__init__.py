"""The operator's command: runs, rounds, clients, enrolments, tokens, adapters. It speaks HTTP to a coordinator and nothing else."""
