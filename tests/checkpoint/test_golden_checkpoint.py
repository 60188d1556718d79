"""A checkpoint written once and never again: what users have on disk must go on loading."""
import pytest
import torch
from golden_networks import NETWORKS
from make_golden_checkpoint import FILE, evaluate


@pytest.fixture(scope='module')
def golden():
    # Tensors and plain containers only: nothing in it can run code on loading.
    return torch.load(FILE, weights_only=True)


def test_every_network_is_in_it(golden):
    assert golden.keys() == NETWORKS.keys()


@pytest.mark.parametrize('name', NETWORKS)
def test_loads_strictly_and_computes_what_it_did(name, golden):
    entry = golden[name]
    network = NETWORKS[name]()
    network.load_state_dict(entry['state_dict'], strict=True)
    counts = [value for key, value in network.state_dict().items()
              if key.endswith('num_batches_tracked')]
    assert counts and all(count == 5 for count in counts)
    outputs = evaluate(network, entry['image'])
    assert len(outputs) == len(entry['outputs'])
    for ours, theirs in zip(outputs, entry['outputs']):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', NETWORKS)
def test_its_entries_are_those_of_today(name, golden):
    """Names, shapes and types, so that what is written now loads in older installations."""
    def describe(state_dict):
        return {key: (tuple(value.shape), value.dtype) for key, value in state_dict.items()}

    assert describe(NETWORKS[name]().state_dict()) == describe(golden[name]['state_dict'])
