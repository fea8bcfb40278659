"What holds for all tests."
import os

# Set before torch is imported, in each worker: two workers with two threads each would wait for one another's cores.
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')

def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='the whole of tests that have a short version: thousands of cases instead of hundreds')
