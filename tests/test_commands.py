"All commands: help at once with an example that runs, exit status, quiet, plans without a merge, completion."
import os, shlex, shutil, signal, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pandas as pd, pytest
from spectrum_merging import bench, cli
from spectrum_merging.command import commands, parser, read_arguments
from spectrum_merging.lab import run as lab_run
from spectrum_merging.plan import Plan
from spectrum_merging.rules import rule_names
from test_compare import make, with_head

root = Path(__file__).parent.parent
scripts = Path(sys.executable).parent

def ran(line, at):
    "What a command line of a shell gives: status, output, errors"
    p = subprocess.run([scripts/(words := shlex.split(line))[0], *words[1:]], capture_output=True, text=True, cwd=at)
    assert 'Traceback' not in p.stderr, p.stderr
    return p.returncode,p.stdout,p.stderr

@pytest.fixture(scope='module')
def d(tmp_path_factory):
    "mood/, topic/, base/, mood.csv, topic.jsonl"
    res = tmp_path_factory.mktemp('commands')/'d'
    make(res, 'distilbert', True)
    with_head(res/'base', ['a','b']).save_pretrained(res/'base') # as its experts: with prefix and head
    return res

def example(name): return commands[name][1]

def test_all_have_help_with_their_example():
    scripts = [o for o in (root/'settings.ini').read_text().splitlines() if 'spectrum_merging.cli:' in o]
    assert [o.split()[0] for o in scripts]==list(commands)
    for name in commands:
        text = parser(name).format_help()
        assert text.endswith(f'example:\n  {example(name)}\n') and example(name).startswith(f'{name} ')
        assert '--version' in text and '-q, --quiet' in text and commands[name][0].__doc__ in ' '.join(text.split())

def test_light():
    "Help, version and the list import neither torch nor, where nothing is listed, pandas"
    for line,heavy in (('--help', ('torch','pandas','numpy','transformers')), ('--version', ('torch','pandas','numpy','transformers')), ('--list', ('torch','transformers'))):
        code = f"""import sys
from spectrum_merging.cli import merge_cli
sys.argv = ['spectrum-merge', '{line}']
try: merge_cli()
except SystemExit as e: status = e.code
found = [o for o in {heavy} if o in sys.modules]
sys.exit(f'{{found}} {{status}}' if found or status else 0)"""
        p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|dict(PYTHONPATH=str(root)))
        assert p.returncode==0 and p.stdout, p.stderr

@pytest.mark.parametrize('name', ['spectrum-scan','spectrum-merge','spectrum-extract','spectrum-verify'])
def test_examples(d, name):
    "As they stand below the help; what one writes another reads"
    if name=='spectrum-verify' and not (d/'merged').exists(): ran(example('spectrum-merge'), d)
    status,out,err = ran(example(name), d)
    assert status==0 and out, err

def test_example_of_compare(d, monkeypatch):
    monkeypatch.setenv('SPECTRUM_CACHE', str(d/'cache'))
    status,out,err = ran(example('spectrum-compare'), d)
    assert status==0 and (d/'compared/report.md').is_file(), err

def _here(name, d, monkeypatch):
    "An example within this process, where what takes minutes is made small"
    monkeypatch.chdir(d)
    monkeypatch.setattr(sys, 'argv', shlex.split(example(name)))
    getattr(cli, name.replace('spectrum-', '')+'_cli')()

def test_example_of_run(d, monkeypatch, capsys):
    from test_lab_run import digits_tasks, small_vision, tiny
    run = lab_run.run
    def small(name, data, out, budget, show, **how):
        assert (name, budget)==('vision', 'quick')
        return run(small_vision, out=out, tasks=digits_tasks(), budget=tiny, cache=d/'cache', parts=['reference'], show=show, progress=False)
    monkeypatch.setattr(lab_run, 'run', small)
    _here('spectrum-run', d, monkeypatch)
    assert 'Results and figures are in' in capsys.readouterr().out

def test_example_of_bench(d, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench, 'bench_engine', lambda gigabytes, repeats, folder: seen.append((gigabytes, repeats)) or pd.DataFrame(dict(seconds=[1.])))
    _here('spectrum-bench', d, monkeypatch)
    assert seen==[(.1, 1)] and 'seconds' in capsys.readouterr().out

def test_example_of_explore(d):
    "Serves until Ctrl-C; without voila says what to install"
    at = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=d, env=os.environ|dict(BROWSER='true'))
    words = shlex.split(example('spectrum-explore'))
    # what runs in the background of a shell ignores Ctrl-C, and so would its children
    p = subprocess.Popen([scripts/words[0], *words[1:]], **at, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    if not find_spec('voila'):
        _,err = p.communicate(timeout=300)
        assert p.returncode==1 and 'pip install' in err, err
        return
    try:
        line = next((o for o in p.stdout if 'http' in o), None)
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=60)
    finally: p.kill()
    assert line

@pytest.mark.parametrize('line, status, says', [
    ('spectrum-merge mood/ topic/ --out x --strategy snr_wnner', 2, "did you mean 'snr_winner'?"),
    ('spectrum-merge mood/ topic/ --out x --stratgy ties', 2, 'did you mean --strategy?'),
    ('spectrum-merge mood/ topic/ --out x --strategy ties', 2, 'pass base='),
    ('spectrum-merge mood/ topic/ --out x --base base/ --strategy ties --density 2', 2, 'density is 2'),
    ('spectrum-merge mood/ topic/ --out x --density 0.2', 2, '--density is a setting of ties, dare, not of standard'),
    ('spectrum-merge mood/ topic/', 2, '--out names the new folder'),
    ('spectrum-merge mood/ topic/ --out x --of both', 2, "invalid choice: 'both'"),
    ('spectrum-merge mood/ topic/ --out x --shard-size big', 2, 'pass a size like'),
    ('spectrum-merge mood/ topic/ --out x --plan p.csv --top 3', 2, 'leave out --top'),
    ('spectrum-merge mood/ topic/ --out x --estimator iqr', 2, 'is unknown'),
    ('spectrum-merge a=mood/ topic/ --out x', 2, 'name all models or none'),
    ('spectrum-merge mood/ topc/ --out x', 1, 'topc/ does not exist'),
    ('spectrum-merge mood/ topic/ --out mood', 1, 'exists and is not empty'),
    ('spectrum-merge mood/ topic/ --out x --save-plan mood.csv', 1, 'mood.csv exists'),
    ('spectrum-merge mood/ topic/ --out x --plan mood.csv', 1, 'is no plan'),
    ('spectrum-scan', 2, 'required: model'),
    ('spectrum-scan nowhere/', 1, 'does not exist'),
    ('spectrum-scan mood/ base/', 2, 'nothing here takes base/'),
    ('spectrum-scan mood/ --dens 3', 2, 'there is no option --dens'),
    ('spectrum-scan mood/ --alpha', 2, '--alpha needs a value'),
    ('spectrum-scan mood/ --pdb', 2, 'there is no option --pdb'),
    ('spectrum-scan mood/ -x', 2, 'nothing here takes -x'),
    ('spectrum-extract mood/ --base base/ --out x --rank 2 --energy 0.5', 2, 'rank and energy are given'),
    ('spectrum-verify mood/', 1, 'mood'),
    ('spectrum-compare mood/ topic/ --base base/ --data a.csv --out x', 2, 'name each task'),
    ('spectrum-compare a=mood/ b=topic/ --base base/ --data a=a.csv b=b.csv --out x --budget soon', 2, 'pass a time like'),
    ('spectrum-run vision --quick --budget full', 2, 'leave one of them'),
    ('spectrum-run visio', 2, "invalid choice: 'visio'")])
def test_status(d, line, status, says):
    "2 for what cannot be meant, 1 for what is refused; one line, nothing written"
    before = sorted(d.iterdir())
    got,out,err = ran(line, d)
    assert got==status and says in err and not out, (got, out, err)
    assert len(err.strip().splitlines())==1 and sorted(d.iterdir())==before

def test_settings_as_options(d):
    def plan(words):
        status,out,err = ran(f'spectrum-merge mood/ topic/ --base base/ --dry-run --save-plan {words[0]}.csv {words[1]}', d)
        assert status==0, err
        return Plan.load(d/f'{words[0]}.csv')
    a,b = plan(('one', "--strategy 'ties(density=0.3)'")),plan(('two', '--density=0.3 --strategy ties'))
    assert a.digest==b.digest and a.meta['strategy']=='ties(density=0.3)'
    found = plan(('three', '--strategy snr_winner --alpha 0.05 --top 30')).meta
    assert found['estimator']=='flip(alpha=0.05)'
    status,out,err = ran('spectrum-scan mood/ --base base/ --alpha 0.05 --estimator mp --out alpha.csv', d)
    assert status==0 and {*pd.read_csv(d/'alpha.csv').estimator}=={'mp(alpha=0.05)'}

def test_settings_of_repairs_and_doubt():
    "A repair among several; two that take the same are not guessed between"
    name = 'spectrum-merge'
    def read(line): return read_arguments(parser(name), shlex.split(line), commands[name][2])
    assert read('a b --repair match batchnorm --ridge 0.2')['repair']==['match(ridge=0.2)', 'batchnorm']
    for line in ('a b --strategy regmean --estimator mp --alpha 0.1', "a b --strategy 'ties(density=0.1)' --density 0.1", 'a b --density 1 --density 2 --strategy ties'):
        with pytest.raises(SystemExit, match='2'): read(line)

def test_dry_run(d, tmp_path):
    "Shows the plan that a merge has, and what a merge would refuse; writes the plan alone"
    line = f'spectrum-merge mood=mood/ topic=topic/ --base base/ --strategy snr_winner --top 30'
    status,out,err = ran(f'{line} --dry-run --save-plan {tmp_path}/plan.csv --out {tmp_path}/out', d)
    assert status==0 and 'largest SNR' in out and 'nothing is written' in out
    assert [o.name for o in tmp_path.iterdir()]==['plan.csv']
    assert ran(f'{line} --out {tmp_path}/out', d)[0]==0
    assert Plan.load(tmp_path/'plan.csv').digest==Plan.load(tmp_path/'out/plan.csv').digest
    status,out,err = ran(f'spectrum-merge mood=mood/ topic=topic/ --base base/ --plan {tmp_path}/plan.csv --out {tmp_path}/again -q', d)
    assert (status, out)==(0, '') and (tmp_path/'again/model.safetensors').read_bytes()==(tmp_path/'out/model.safetensors').read_bytes()
    for change in (f'--out {tmp_path}/out', '--files-from nobody', '--out mood/x'):
        status,out,err = ran(f'{line} --dry-run {change}', d)
        assert status==1 and err, change
    table = pd.read_csv(tmp_path/'plan.csv', skiprows=1)
    (tmp_path/'odd.csv').write_text((tmp_path/'plan.csv').read_text().replace(table.name[0], 'nowhere'))
    status,out,err = ran(f'spectrum-merge mood=mood/ topic=topic/ --base base/ --plan {tmp_path}/odd.csv --dry-run', d)
    assert status==1 and 'nowhere' in err

def test_quiet(d, tmp_path):
    "A table that was asked for, and errors, are said; nothing else"
    assert ran(f'spectrum-merge -q mood/ topic/ --out {tmp_path}/out', d)[1:]==('', '')
    assert ran(f'spectrum-verify {tmp_path}/out --quiet', d)==(0, '', '')
    assert ran('spectrum-scan mood/ -q', d)[1].split()[0]=='name'
    assert ran('spectrum-scan nowhere/ -q', d)[2]

def test_completion_in_bash(tmp_path):
    status,out,err = ran('spectrum-scan --completion bash', tmp_path)
    (tmp_path/'c.sh').write_text(out)
    (tmp_path/'mood').mkdir()
    def complete(*words):
        code = f"source ./c.sh; COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words)-1}; _spectrum; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        return subprocess.run(['bash', '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert complete('spectrum-merge', 'a', '--strategy', '')==rule_names('layer', 'matrix')
    assert complete('/some/where/spectrum-merge', '--strategy', 'snr_w')==['snr_winner','snr_weighted']
    assert complete('spectrum-scan', 'mood', '--est')==['--estimator'] and complete('spectrum-run', 'is-it')==['is-it-signal']
    assert complete('spectrum-merge', 'mo')==['mood']
    for name in commands: assert f' {name}' in out.splitlines()[-1]

@pytest.mark.parametrize('shell', ['fish','zsh'])
def test_completion_elsewhere(tmp_path, shell):
    if not shutil.which(shell): pytest.skip(f'no {shell}')
    (tmp_path/'c').write_text(ran(f'spectrum-merge --completion {shell}', tmp_path)[1])
    ask = dict(fish='source ./c; complete -C "spectrum-merge a --strategy snr_wi"; complete -C "spectrum-merge --dry"',
        zsh='source ./c; print ${_comps[spectrum-merge]}')[shell]
    out = subprocess.run([shell, *(['-f'] if shell=='zsh' else ['--no-config']), '-c', ask], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert ('snr_winner' in out and '--dry-run' in out) if shell=='fish' else '_spectrum' in out

def test_wheel_alone(tmp_path):
    "In an environment of its own the wheel brings all commands; they work from anywhere, without the repository"
    from test_project import wheel
    (tmp_path/'dist').mkdir()
    wheel(root, tmp_path/'dist')
    venv = tmp_path/'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    site = next((venv/'lib').glob('python*/site-packages'))
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    subprocess.run([sys.executable, '-m', 'pip', '--python', venv/'bin/python', 'install', '-q', '--no-deps', '--no-index', next((tmp_path/'dist').glob('*.whl'))], check=True, env=env)
    (site/'rest.pth').write_text('\n'.join(o for o in sys.path if o.endswith('site-packages'))) # what it requires
    (tmp_path/'else').mkdir()
    for name in commands:
        said = subprocess.run([venv/'bin'/name, '--help'], capture_output=True, text=True, check=True, cwd=tmp_path/'else', env=env).stdout
        assert example(name) in said
    where = subprocess.run([venv/'bin/python', '-c', 'import spectrum_merging.all as o; print(o.__file__)'], capture_output=True, text=True, check=True, cwd=tmp_path/'else', env=env)
    assert where.stdout.startswith(str(venv))
