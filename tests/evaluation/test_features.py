"""Feature extractors: whose features they are, what pictures become on their way there, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from cogview.errors import CheckpointError, ConfigError
from cogview.evaluation import seeded_network
from cogview.evaluation.blur import blurred, pixels_of, with_contrast
from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.features import (
    ExtractorFacts,
    InceptionExtractor,
    SeededExtractor,
    TokenizerExtractor,
    for_inception,
)
from cogview.evaluation.frechet import frechet_distance, moments_of
from cogview.evaluation.inception_network import BLOCKS, InceptionNetwork
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from cogview.weight_files import require_sha256

SEEDED_SHA256 = "0a14afe57b6b0a5e907f032d1559f231e0584aa67eb282a6d9066d22ae795ed1"


def photos(count, *, size=64):
    """Smooth shapes with texture: pictures that a filter changes."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        waves = np.sin(np.linspace(0, generator.uniform(2, 20), size))[:, None, None] * generator.uniform(20, 90, 3)
        noise = generator.normal(0, 15, (size, size, 3))
        pictures.append(Image.fromarray(np.clip(128 + waves + noise, 0, 255).astype(np.uint8)))
    return pictures


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(InceptionNetwork().state_dict(), path)
    return path


def test_the_seeded_filters_are_the_same_everywhere():
    extractor = SeededExtractor()
    assert extractor.facts.sha256 == SEEDED_SHA256
    assert extractor.facts.dim == seeded_network.DIM
    features = extractor(pixels_of(photos(3))).features_BD
    assert features.shape == (3, seeded_network.DIM)
    assert np.isfinite(features).all()


def test_blur_and_noise_move_seeded_features_further_the_stronger_they_are():
    extractor = SeededExtractor()
    pictures = photos(150)
    generator = np.random.default_rng(1)

    def moments(pixels):
        return moments_of(FeatureRows([extractor(pixels).features_BD]))

    clean = moments(pixels_of(pictures))
    blurs = [frechet_distance(moments(pixels_of(pictures, radius=radius)), clean) for radius in (0, 1, 2, 4, 8)]
    assert blurs[0] <= 1e-6
    assert blurs == sorted(blurs)
    noises = []
    for strength in (2, 8, 24):
        pixels = pixels_of(pictures).float()
        noise = torch.from_numpy(generator.normal(0, strength, pixels.shape)).float()
        noises.append(frechet_distance(moments((pixels + noise).clamp(0, 255).byte()), clean))
    assert noises == sorted(noises)


def test_seeded_features_need_forty_pixels():
    with pytest.raises(ConfigError, match="40 pixels"):
        SeededExtractor()(torch.zeros(1, 3, 39, 64, dtype=torch.uint8))


def test_inception_has_the_layers_of_the_published_layout():
    """As in pytorch-fid's file: 94 convolutions, each with five tensors besides its counter, and the classifier."""
    names = [name for name in InceptionNetwork().state_dict() if not name.endswith("num_batches_tracked")]
    assert len(names) == 94 * 5 + 2
    assert {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch5x5_2.bn.running_var",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
    } <= (set(names))
    assert sum(parameter.numel() for parameter in InceptionNetwork().parameters()) == 23_850_960
    assert len(BLOCKS) == 11


def test_inception_weights_are_read_as_they_are(inception_file):
    extractor = InceptionExtractor(inception_file)
    assert extractor.facts.sha256 == require_sha256(inception_file)
    pixels = pixels_of(photos(2))
    extracted = extractor(pixels)
    network = InceptionNetwork().eval()
    network.load_state_dict(torch.load(inception_file, weights_only=True))
    with torch.inference_mode():
        features, scores = network(for_inception(pixels, resize="bilinear"))
    assert np.allclose(extracted.features_BD, features, atol=1e-6)
    assert np.allclose(extracted.logits_BK, scores, atol=1e-6)
    assert extracted.logits_BK.shape == (2, 1008)


def test_only_the_published_weights_make_an_fid(inception_file):
    facts = InceptionExtractor(inception_file).facts
    assert not facts.is_published
    assert facts.score_name("FID", other="FD") == f"FD[inception-v3-{facts.sha256[:8]}]"
    published = ExtractorFacts(name="inception", sha256="6726825d", dim=1, resize="", is_published=True)
    assert published.score_name("FID", other="FD") == "FID"


def test_another_sha256_or_layout_is_refused(inception_file, tmp_path):
    with pytest.raises(CheckpointError, match="not 00"):
        InceptionExtractor(inception_file, sha256="00" * 32)
    state = {name: tensor for name, tensor in InceptionNetwork().state_dict().items() if not name.startswith("fc.")}
    torch.save({**state, "AuxLogits.fc.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"missing: fc.bias, fc.weight; unknown: AuxLogits.fc.weight"):
        InceptionExtractor(tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="bicubic"):
        InceptionExtractor(inception_file, resize="nearest")  # type: ignore[arg-type]


def test_the_three_ways_to_299_pixels():
    """Each against its definition: half-pixel centres, TensorFlow 1's corners, Pillow's bicubic in floats."""
    pixels = torch.randint(0, 256, (1, 3, 80, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = pixels[0, 0].double().numpy()
    row, column = 101, 200
    found = {
        name: for_inception(pixels, resize=name)[0, 0].double().numpy()
        for name in ("bilinear", "bilinear_tensorflow", "bicubic")
    }

    def at(y, x):
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        dy, dx = y - y0, x - x0
        top = plain[y0, x0] * (1 - dx) + plain[y0, min(x0 + 1, 59)] * dx
        below = plain[min(y0 + 1, 79), x0] * (1 - dx) + plain[min(y0 + 1, 79), min(x0 + 1, 59)] * dx
        return top * (1 - dy) + below * dy

    centres = at((row + 0.5) * 80 / 299 - 0.5, (column + 0.5) * 60 / 299 - 0.5)
    assert found["bilinear"][row, column] == pytest.approx(centres / 127.5 - 1, abs=1e-5)
    assert found["bilinear_tensorflow"][row, column] == pytest.approx(
        (at(row * 80 / 299, column * 60 / 299) - 128) / 128, abs=1e-5
    )
    pillow = Image.fromarray(pixels[0, 0].numpy()).convert("F").resize((299, 299), Image.Resampling.BICUBIC)
    assert np.abs(found["bicubic"] - (np.asarray(pillow) - 128) / 128).max() < 1e-4


def test_tokenizer_features_are_moments_of_its_encoder(tmp_path):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=16, code_dim=4))).eval()
    tokenizer.save(tmp_path)
    extractor = TokenizerExtractor(tmp_path)
    assert extractor.facts.name == f"tokenizer-{tokenizer.fingerprint[:8]}"
    pixels = pixels_of(photos(2))
    with torch.inference_mode():
        hidden = tokenizer.encoder(tokenizer.pixels.normalised(pixels.float() / 255))
    features = extractor(pixels).features_BD
    assert np.allclose(features[:, :4], hidden.mean(dim=(2, 3)), atol=1e-6)
    assert np.allclose(features[:, 4:], hidden.std(dim=(2, 3), correction=0), atol=1e-6)
    assert extractor.facts.dim == 8


@pytest.mark.parametrize("radius", [1, 2, 4, 8])
def test_blur_is_the_gaussian_filter_of_that_deviation(radius):
    picture = photos(1, size=160)[0]
    exact = gaussian_filter(np.asarray(picture).astype(np.float64), sigma=(radius, radius, 0))
    found = np.asarray(blurred(picture, radius=radius)).astype(np.float64)
    inside = slice(4 * radius, -4 * radius)  # at the border each has its own way
    assert np.abs(found - exact)[inside, inside].max() <= 3.0
    assert np.abs(found - np.asarray(picture))[inside, inside].max() > 20


def test_contrast_comes_before_blur_and_is_about_the_mean_grey():
    picture = photos(1)[0]
    expected = np.asarray(blurred(with_contrast(picture, 1.5), radius=2))
    assert np.array_equal(pixels_of([picture], contrast=1.5, radius=2)[0].permute(1, 2, 0).numpy(), expected)
    grey = np.asarray(picture.convert("L")).mean().round()
    stretched = np.asarray(with_contrast(picture, 1.5)).astype(float)
    assert np.abs(stretched - np.clip(grey + 1.5 * (np.asarray(picture).astype(float) - grey), 0, 255)).max() <= 1.01
    assert blurred(picture, radius=0) is picture


def test_inception_is_that_of_torch_fidelity(tmp_path):
    fidelity = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    torch.manual_seed(0)
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.01, 0.2)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.normal_(module.bias, std=0.3)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    names = ["2048", "logits_unbiased"]
    theirs = fidelity.FeatureExtractorInceptionV3("test", names, str(tmp_path / "weights.pth"))
    pixels = pixels_of(photos(2))
    features, scores = theirs(pixels)
    extracted = InceptionExtractor(tmp_path / "weights.pth", resize="bilinear_tensorflow")(pixels)
    assert np.abs(features[0] - features[1]).max() > 0.01 * float(features.abs().max()), "pictures tell apart"
    assert np.allclose(extracted.features_BD, features, rtol=1e-3, atol=1e-4 * float(features.abs().max()))
    assert np.allclose(extracted.logits_BK, scores, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
