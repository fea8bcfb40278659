"The documentation site: built once, with warnings as errors, then looked at in Chromium as a reader would."
import re, shlex, subprocess, sys, threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest
from spectrum_merging import cli # whose commands add themselves
from spectrum_merging.command import commands, parser, read_arguments
from spectrum_merging.files import parse_json
from test_project import lacks_foreign_hosts, notebooks, relative_links

root = Path(__file__).parent.parent
# A phone that is neither large nor new
phone = dict(width=390, height=844)

@pytest.fixture(scope='module')
def site():
    "Folder of the site. Building it takes minutes, so that all tests of pages stand in this file"
    pytest.importorskip('myst_nb')
    subprocess.run([sys.executable, root/'nbs/_sphinx/build.py', 'site'], cwd=root, check=True)
    return root/'build/site'

def pages(site): return sorted(o for o in site.rglob('*.html') if o.name not in ('genindex.html','search.html'))

def test_docs_build(site):
    "Each notebook has its page, with API, prose and math"
    for nb in notebooks:
        rel = nb.relative_to(root/'nbs')
        page = site/rel.parent/(re.sub(r'^\d+[a-z]*_', '', rel.stem)+'.html')
        assert page.is_file() and page.with_suffix('.html.md').is_file()
    said = (site/'experiments/bert_sst2_cola.html').read_text(encoding='utf-8')
    assert re.search(r'<th[^>]*><p>merge − merge, task</p></th>', said) # tables in outputs are tables
    page = (site/'checkpoint.html.md').read_text(encoding='utf-8')
    assert 'class Checkpoint(' in page and 'def Checkpoint(' not in page
    assert not [o.name for o in site.rglob('*.html.md') if '__main__.' in o.read_text(encoding='utf-8')]
    html = (site/'edges.html').read_text(encoding='utf-8')
    assert '<math' in html and 'id="snr"' in html and '<img' in html
    for o in site.rglob('*'): # the theme names its author in its footer
        if o.suffix in ('.html','.md'): lacks_foreign_hosts(re.sub(r'<a [^>]*github\.com/pradyunsg[^>]*>', '', o.read_text(encoding='utf-8')))
    for o in site.rglob('*.html.md'):
        for link in relative_links(o.read_text(encoding='utf-8')): assert (o.parent/link).is_file(), f'{o.name}: {link}'

class Page(HTMLParser):
    "What a page names (`ids`), where it leads (`links`), what its pictures say (`alts`)"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.alts = set(),[],[]
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        o = dict(attrs)
        self.ids |= {o[k] for k in ('id','name') if o.get(k)}
        self.links += [o[k] for k in ('href','src') if o.get(k) and not re.match(r'\w+:', o[k])]
        if tag=='img' or tag=='figure' and o.get('role')=='img': self.alts.append(o.get('alt') or o.get('aria-label') or '')

def test_links_and_alternatives(site):
    "Every link within the site leads to a file and a place in it; every picture says in words what it shows"
    found,dead,mute = {o: Page(o) for o in pages(site)},[],[]
    assert len(found)>=len(notebooks)
    for path,page in found.items():
        mute += [f'{path.name}: {o!r}' for o in page.alts if len(o)<15 or re.search(r'\.(png|svg)$', o)]
        for link in page.links:
            to,anchor = urldefrag(unquote(link))
            target = (path.parent/to.partition('?')[0]).resolve() if to else path
            if target.is_dir(): target = target/'index.html'
            if not target.is_file() or anchor and target in found and anchor not in found[target].ids: dead.append(f'{path.name}: {link}')
    assert not dead and not mute, (dead, mute)
    assert sum(len(o.alts) for o in found.values())>40

def test_numbers_of_claims(site):
    "Every number beside a claim of the paper stands on the page that the claim's row leads to"
    rows = re.findall(r'<tr.*?</tr>', (site/'experiments/claims.html').read_text(encoding='utf-8'), flags=re.S)
    seen = 0
    for row in rows:
        pages = [(site/'experiments'/o).read_text(encoding='utf-8') for o in re.findall(r'href="(\w+\.html)', row)]
        numbers = re.findall(r'\d*\.\d+', re.sub(r'<[^>]+>', ' ', row))
        for n in numbers: assert any(n in o for o in pages), f'{n} of {row}'
        seen += len(numbers)
    assert seen>4

class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address(site):
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

@pytest.fixture
def page(browser, address):
    "A page at night on a phone; asking any other host fails the test"
    page,asked = browser.new_page(viewport=phone, color_scheme='dark'),[]
    page.on('request', lambda o: asked.append(o.url))
    page.route(lambda url: not url.startswith(address), lambda o: o.abort())
    yield page
    page.close()
    # what stands in the page itself is no request
    assert not [o for o in asked if not o.startswith((address, 'data:', 'blob:'))]
    assert asked

wide = """() => {
    const most = document.documentElement.clientWidth
    const out = [...document.querySelectorAll('article *')].filter(o => o.getBoundingClientRect().right > most + 1
        && !o.closest('div.cell_output, .table-wrapper, pre, div.math, details:not([open])'))
    return document.documentElement.scrollWidth > most ? out.slice(0, 3).map(o => o.outerHTML.slice(0, 80)).concat('wide') : []}"""
# What has no ground of its own needs no filter
pictures = """() => [...document.querySelectorAll('article img, .live figure svg')].map(o => [o.naturalWidth || o.clientWidth,
    o.matches('svg:not(:has(> rect[fill="white"]))') ? 'none to invert' : getComputedStyle(o).filter])"""

def test_every_page_on_a_phone(page, site, address):
    "No page is wider than a phone, all pictures are there, and without a white ground at night"
    bad,seen = [],0
    for o in pages(site):
        page.goto(f'{address}/{o.relative_to(site).as_posix()}')
        if found := page.evaluate(wide): bad.append((o.name, found))
        shown = page.evaluate(pictures)
        bad += [(o.name, k) for k in shown if not k[0] or 'invert' not in k[1]]
        seen += len(shown)
    assert not bad and seen>40, (bad, seen)
    page.emulate_media(color_scheme='light')
    page.goto(f'{address}/edges.html')
    assert all(width and how=='none' for width,how in page.evaluate(pictures))

def test_formulas_have_their_font(page, address):
    "It comes with the page, and it knows how to set formulas: a parenthesis grows with the matrix in it"
    page.goto(f'{address}/bounds.html')
    page.evaluate('document.fonts.ready')
    assert page.evaluate("[...document.fonts].some(o => o.family.includes('STIX Two Math Pages') && o.status=='loaded')")
    height = "o => o.getBoundingClientRect().height"
    table,sign = (page.locator(f'math:has(mtable) {o}').first.evaluate(height) for o in ('mtable','mo:text-is("(")'))
    assert table>20 and sign>.8*table

@pytest.mark.parametrize('words,found', [('hugging face', 'tutorials/your_models.html'), ('glossary', 'concepts/glossary.html'),
    ('which method', 'recommend.html'), ('lora', 'tutorials/lora_adapters.html')])
def test_search(page, address, words, found):
    page.goto(f'{address}/search.html?q={words.replace(" ", "+")}')
    page.locator(f'#search-results a[href*="{found}"]').first.wait_for(timeout=10_000)

def shell_lines():
    "`(notebook, command line)` of everything that a page tells to type"
    for nb in notebooks:
        for c in parse_json(nb.read_text(encoding='utf-8'), nb)['cells']:
            text = ''.join(c['source'])
            if c['cell_type']!='markdown': continue
            blocks = re.findall(r'^```(?:sh|bash)\n(.*?)^```', text, flags=re.M|re.S)
            for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
                for part in line.split('&&'):
                    words = shlex.split(part, comments=True)
                    if words and words[0].startswith('SPECTRUM_'): words = words[1:]
                    if words and words[0].startswith('spectrum-'): yield nb.name,words

def test_commands_on_pages_are_read():
    "Every command of README, tutorials and how-tos has the options that it is shown with"
    lines = list(shell_lines())
    assert {'index.ipynb','00_your_models.ipynb','01_publish.ipynb'} <= {o for o,_ in lines} and len(lines)>12
    for nb,(name,*words) in lines:
        try: read_arguments(parser(name), words, commands[name][2])
        except SystemExit as e: pytest.fail(f'{nb}: {name} {shlex.join(words)} ({e})')
