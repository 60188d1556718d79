"""docs/evidence.md shows what docs/evidence/results.jsonl holds."""
import json
import runpy
import shutil

from conftest import ROOT, tool

PAGE_TOOL = runpy.run_path(str(ROOT / 'tools/dev/evidence_page.py'))
RESULTS = ROOT / 'docs/evidence/results.jsonl'


def test_tables_and_pictures_are_those_of_the_results(tmp_path):
    tool('dev/evidence_page.py', '--check', cwd=tmp_path)


def test_a_changed_result_is_found(tmp_path):
    for name in ('docs', 'tools'):
        shutil.copytree(ROOT / name, tmp_path / name)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines[0]['epochs'][-1]['inhibited'] += 1
    (tmp_path / 'docs/evidence/results.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    stale = runpy.run_path(str(tmp_path / 'tools/dev/evidence_page.py'))['stale']()
    assert stale == [*PAGE_TOOL['PICTURES'], 'evidence.md']


def test_every_table_and_picture_is_in_a_page():
    pages = '\n'.join(page.read_text() for page in PAGE_TOOL['PAGES'])
    assert all(f'<!-- table: {name} -->' in pages for name in PAGE_TOOL['TABLES'])
    assert all(f'(evidence/{name})' in pages for name in PAGE_TOOL['PICTURES'])


def test_corrupted_labels_are_compared_at_the_same_training_loss():
    losses = [0.9, 0.5, 0.2]
    run = dict(epochs=[dict(loss=loss, accuracy=80 + index) for index, loss in enumerate(losses)])
    assert PAGE_TOOL['stopped'](run, 0.5)['accuracy'] == 81
    assert PAGE_TOOL['stopped'](run, 0.1)['accuracy'] == 82
