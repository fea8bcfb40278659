"Recommendations: their evidence is what the pages show, and every recipe in it runs"
import html, json, re
from pathlib import Path
import pytest, torch
from spectrum_merging.chain import repair_recipe
from spectrum_merging.recommend import Facts, facts_of, recommend, seen
from spectrum_merging.rules import recipe

pages = Path(__file__).parents[1]/'nbs/experiments'

def rows(page):
    "Cells of all rows of tables that a page keeps, in outputs and in Markdown"
    cells = json.loads((pages/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    for line in [o for c in cells if c['cell_type']=='markdown' for o in ''.join(c['source']).splitlines() if o.startswith('|')]:
        # .5 in prose is 0.5 in a table of pandas
        yield [re.sub(r'^\.', '0.', o.strip()) for o in line.strip('|').split('|')]
    found = [''.join(o.get('data', {}).get('text/html', '')) for c in cells for o in c.get('outputs', [])]
    for row in re.findall(r'<tr.*?>(.*?)</tr>', ' '.join(found), re.S):
        yield [html.unescape(re.sub('<.*?>', '', k)) for k in re.findall(r'<t[hd].*?>(.*?)</t[hd]>', row, re.S)]

@pytest.mark.parametrize('one', seen, ids=lambda o: f'{o.page} {o.models} {o.strategy} {o.repairs}')
def test_evidence_stands_on_its_page(one):
    assert any(f'{one.mean:.4f}' in o and f'{one.worst:.4f}' in o for o in rows(one.page))
    recipe(one.strategy, ('layer','matrix'))
    for o in one.repairs: repair_recipe(o)

kinds = [(k, n, h, b) for k in ('convolutions','encoder','decoder') for n in (2, 3, 8) for h in (True, False) for b in (True, False)]

@pytest.mark.parametrize('kind,n,heads,norms', kinds)
@pytest.mark.parametrize('moved', (None, .1, .8))
@pytest.mark.parametrize('inputs', (True, False))
def test_every_case_gets_what_it_can_use(kind, n, heads, norms, moved, inputs):
    found = recommend(Facts(kind, n, heads, norms, moved), inputs=inputs)
    assert inputs or not found.repairs
    assert heads or 'heads' not in found.repairs
    assert moved or not recipe(found.strategy).rule.base
    assert found.notes and repr(found)

def test_facts():
    def draw(*shape): return torch.randn(shape)
    conv = {'conv1.weight': draw(8, 3, 3, 3), 'bn1.running_mean': draw(8), 'bn1.weight': draw(8), 'fc.weight': draw(4, 8)}
    found = facts_of([conv, conv | {'conv1.weight': conv['conv1.weight']*1.5}])
    assert (found.kind, found.norms, found.heads, found.moved)==('convolutions', True, True, None)
    llama = {'model.layers.0.mlp.gate_proj.weight': draw(8, 8), 'model.layers.0.mlp.up_proj.weight': draw(8, 8)}
    assert facts_of([llama, llama]).kind=='decoder'
    with pytest.raises(ValueError, match='2 or more'): facts_of([conv])
