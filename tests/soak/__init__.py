"""A long run of real processes under a seeded schedule of faults: python -m tests.soak --minutes=30 --seed=1"""
