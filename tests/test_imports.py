"The core imports nothing heavy: it runs at the start of every command."
import os, subprocess, sys
from pathlib import Path

core = ('arithmetic','files','patterns','formats','stored','pickles','quantised','names','parallel','rules','spectrum','lowrank','adapter','checkpoint','units','scan','strategies','operations',
    'preflight','plan','interop','layout','stream','journal','folder','merge','verify')
heavy = 'torch','transformers','datasets','torchvision','matplotlib' # torch alone: 2 s and 500 MB

def test_core_is_light():
    code = f'''import sys, spectrum_merging
for name in {core}:
    __import__(f'spectrum_merging.{{name}}')
    found = [o for o in {heavy} if o in sys.modules]
    if found: sys.exit(f'spectrum_merging.{{name}} imports {{found}}')'''
    root = Path(__file__).parent.parent
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root,
        env=os.environ|dict(PYTHONPATH=str(root)))
    assert res.returncode==0, res.stderr
