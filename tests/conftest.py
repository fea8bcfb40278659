"What holds for all tests."
import os
import pytest
from pages import chromium, playwright

# Set before torch is imported, in each worker: two workers with two threads each would wait for one another's cores.
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')

def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='fuzzing and faults to the full: hours instead of minutes')

@pytest.fixture(scope='session')
def browser():
    "Chromium"
    with playwright().sync_playwright() as pw:
        found = pw.chromium.launch(executable_path=chromium(pw), args=['--no-sandbox'])
        yield found
        found.close()
