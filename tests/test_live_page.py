"Controls of lessons on a page without a kernel, in a real browser: each position shows what Python computes for it."
import json, re
from importlib import import_module
from pathlib import Path
import pytest
from pages import opened
from test_project import builder

root = Path(__file__).parent.parent
build = builder(root)

def cells(name): return [c for c in json.loads((root/'nbs'/name).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

def lesson(name):
    "The function that a lesson gives its controls, made again from its cells, and what it stored for pages"
    every = cells(name)
    (end,) = (i for i,c in enumerate(every) if any(build.states_kind in o.get('data', {}) for o in c['outputs']))
    sources = [''.join(c['source']) for c in every]
    # the module stands for its cells: to run them would define its rules a second time, for all tests
    names = dict(vars(import_module('spectrum_merging.'+sources[0].split()[-1])))
    needed = [s for s in sources[:end] if s.startswith(('import', 'from'))] + [sources[end].partition('\nlive = ')[0]]
    exec(compile('\n'.join(needed), name, 'exec'), names)
    return names[sources[end].partition('Live(')[2].partition(',')[0]],every[end]['outputs'][0]['data']

def opened_page(browser, tmp_path, data):
    "A page of nothing but what `build.py` makes of an output, and the site's script"
    (tmp_path/'live.js').write_bytes((root/'nbs/_sphinx/static/live.js').read_bytes())
    (tmp_path/'page.html').write_text(f'<meta charset="utf-8"><script src="live.js" defer></script>{build.live_html(data, "a lesson")}', encoding='utf-8')
    page = opened(browser, (tmp_path/'page.html').as_uri(), tmp_path.as_uri())
    page.locator('.live label').first.wait_for()
    return page

def same_picture(a, b):
    "But for what another processor rounds otherwise: a tenth of a pixel, the last of three digits"
    (texts,at),(others,there) = ((number.split(o), [float(v) for v in number.findall(o)]) for o in (a, b))
    assert texts==others
    assert all(abs(v-w)<=.11+.006*abs(w) for v,w in zip(at, there))

number = re.compile(r'-?\d+\.?\d*(?:e[-+]?\d+)?')

# What is moved, one after the other, from where the lesson ended
moves = {'30_strategies.ipynb': [('threshold', .5), ('strategy', 'snr_max'), ('threshold', 3.), ('strategy', 'standard')],
    '00_spectrum.ipynb': [('strength', 0.), ('aspect', .25), ('noise', 1.), ('strength', 4.)]}

@pytest.mark.parametrize('name', moves)
def test_controls_without_kernel(browser, tmp_path, name):
    f,data = lesson(name)
    page,states = opened_page(browser, tmp_path, data),data[build.states_kind]
    controls = {o['name']: o for o in states['controls']}
    at,seen = {k: o['values'][i] for (k,o),i in zip(controls.items(), states['start'])},set()
    def shows():
        "The picture is Python's; as the browser writes it, since it closes tags in its own way"
        drawn = page.evaluate("svg => { const o = document.createElement('div'); o.innerHTML = svg; return o.innerHTML }", f(**at)[0])
        same_picture(page.locator('.live figure').inner_html(), drawn)
        seen.add(drawn)
    shows()
    for k,v in moves[name]:
        control,at[k] = page.locator('.live label', has_text=k).locator('input, select'),v
        if controls[k]['slider']:
            control.focus()
            control.press('Home')
            for _ in range(controls[k]['values'].index(v)): control.press('ArrowRight')
            assert page.locator('.live label', has_text=k).locator('output').inner_text()==f'{v:g}'
        else: control.select_option(v)
        shows()
    assert len(seen)==1+len(moves[name]) # each move drew another picture

@pytest.mark.parametrize('name', moves)
def test_pages_have_the_controls(tmp_path, monkeypatch, name):
    "What Sphinx reads of a lesson holds the HTML that the test above opens, and each page asks for the script"
    monkeypatch.setattr(build, 'src', tmp_path)
    build.write_page(Path(name), root/'nbs', build.notebooks(root/'nbs'))
    written = json.loads((tmp_path/build.page(Path(name))).read_text(encoding='utf-8'))['cells']
    (html,) = (''.join(o['data']['text/html']) for c in written for o in c.get('outputs', []) if 'class="live"' in str(o.get('data')))
    (alt,) = (re.search(r'#\| fig-alt: (.+)', ''.join(c['source']))[1] for c in cells(name) if any(build.states_kind in o.get('data', {}) for o in c['outputs']))
    assert html==build.live_html(lesson(name)[1], alt)
    assert "'live.js'" in (root/'nbs/_sphinx/conf.py').read_text(encoding='utf-8')
