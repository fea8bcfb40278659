"What is no lesson: packaging, notebook hygiene, and documentation that builds without a warning."
import json, re, subprocess, sys, zipfile
from importlib.metadata import entry_points, version
from pathlib import Path
import pytest, spectrum_merging

root = Path(__file__).parent.parent
notebooks = sorted(o for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)

def test_version(): assert version('spectrum-merging')==spectrum_merging.__version__

def test_entry_points():
    assert 'spectrum_merging' in {o.name for o in entry_points(group='nbdev')}
    scripts = {o.name: o for o in entry_points(group='console_scripts')
        if o.value.startswith('spectrum_merging')}
    assert {'spectrum-scan','spectrum-merge','spectrum-run'} <= set(scripts)
    for o in scripts.values(): assert callable(o.load())

def test_wheel_holds_all_modules(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, root],
        check=True)
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    have = {o for o in names if o.startswith('spectrum_merging/')}
    assert have=={o.relative_to(root).as_posix() for o in (root/'spectrum_merging').rglob('*.py')}

@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_notebook_hygiene(nb):
    "Small, free of machine paths, warnings, progress bars and errors; slow cells keep what they showed"
    assert nb.stat().st_size <= 300_000
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    text = json.dumps([[o for o in c.get('outputs', []) if 'image/png' not in o.get('data', {})]
        for c in cells])
    assert not re.search(r'/(tmp|work|root|home|opt)/|Warning|\d+%\||Traceback|"stderr"', text)
    for c in cells:
        src = ''.join(c['source'])
        if src.startswith('#| slow') and re.match(r'[\w\[\]"\'. ]+$', src.splitlines()[-1]):
            assert c['outputs'], src

def test_docs_build():
    "The site builds with warnings as errors; each notebook has its page, with API, prose and math"
    pytest.importorskip('myst_nb')
    subprocess.run([sys.executable, root/'nbs/_sphinx/build.py', 'site'], cwd=root, check=True)
    site = root/'build/site'
    for nb in notebooks:
        rel = nb.relative_to(root/'nbs')
        page = site/rel.parent/(re.sub(r'^\d+[a-z]*_', '', rel.stem)+'.html')
        assert page.is_file() and page.with_suffix('.html.md').is_file()
    said = (site/'experiments/bert_sst2_cola.html').read_text(encoding='utf-8')
    assert re.search(r'<th[^>]*><p>merge − merge, task</p></th>', said) # tables in outputs are tables
    html = (site/'spectrum.html').read_text(encoding='utf-8')
    assert '<math' in html and 'id="snr"' in html and '<img' in html
