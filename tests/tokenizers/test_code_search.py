"""The search for the nearest code: exact, bounded, the same in 16 bits and under autocast."""

import pytest
import torch

from cogview.errors import ConfigError
from cogview.tokenizers.code_search import nearest_codes, squared_distances


def vectors(seed: int, number: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def test_nearest_codes_equal_the_plain_distance_matrix() -> None:
    searched, codebook = vectors(0, 5000), vectors(1, 64)
    assert torch.equal(nearest_codes(searched, codebook), torch.cdist(searched, codebook).argmin(dim=1))


@pytest.mark.parametrize("buffer_bytes", [1, 64 * 4, 7 * 64 * 4, 2**30])
def test_the_size_of_the_buffer_changes_nothing(buffer_bytes: int) -> None:
    searched, codebook = vectors(0, 300), vectors(1, 64)
    assert torch.equal(nearest_codes(searched, codebook, buffer_bytes=buffer_bytes), nearest_codes(searched, codebook))


def test_the_buffer_holds_no_more_than_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain_addmm = torch.addmm

    def watched(*operands: torch.Tensor, alpha: float, out: torch.Tensor) -> torch.Tensor:
        sizes.append(out.untyped_storage().nbytes())
        return plain_addmm(*operands, alpha=alpha, out=out)

    monkeypatch.setattr(torch, "addmm", watched)
    nearest_codes(vectors(0, 1000), vectors(1, 64), buffer_bytes=4096)
    assert len(sizes) == 63  # 16 rows of 64 distances at a time
    assert max(sizes) <= 4096


def test_an_exact_tie_goes_to_the_lowest_code() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert nearest_codes(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), codebook).tolist() == [1, 0]
    many = torch.zeros(8192, 4)  # all the same code, in a row long enough for every kind of parallel search
    assert nearest_codes(torch.ones(3, 4), many).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_16_bits_are_compared_in_32(dtype: torch.dtype) -> None:
    searched, codebook = (vectors(0, 500) + 20).to(dtype), vectors(1, 64) + 20
    in_fp32 = nearest_codes(searched.float(), codebook)
    assert torch.equal(nearest_codes(searched, codebook), in_fp32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(searched, codebook), in_fp32)
    coarse = torch.cdist(searched.float(), codebook.to(dtype).float()).argmin(dim=1)
    assert not torch.equal(coarse, in_fp32)  # or the case would show nothing


def test_no_vectors_have_no_codes() -> None:
    codes = nearest_codes(torch.zeros(0, 8), vectors(1, 64))
    assert codes.shape == (0,)
    assert codes.dtype == torch.long


def test_distances_to_the_nearest_code() -> None:
    searched, codebook = vectors(0, 200), vectors(1, 64)
    expected = torch.cdist(searched, codebook).min(dim=1).values.square()
    assert torch.allclose(squared_distances(searched, codebook), expected, atol=1e-5)


def test_a_codebook_of_another_dimension_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dimension 8.*dimension 4"):
        nearest_codes(torch.zeros(3, 8), torch.zeros(5, 4))
    with pytest.raises(ConfigError, match=r"\[vectors, dimension\]"):
        nearest_codes(torch.zeros(2, 3, 8), torch.zeros(5, 8))
