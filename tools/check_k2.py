"""Check that k2 works here: import it and intersect a CTC topology with log-probs, against torch's CTC score.

python tools/check_k2.py [cpu|cuda]
"""

from __future__ import annotations

import sys

import torch


def main() -> int:
    """Print versions and return 0, or say what is wrong and return 1."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    try:
        import k2

        torch.manual_seed(0)
        log_probs = torch.randn(1, 8, 5, device=device).log_softmax(-1)
        dense = k2.DenseFsaVec(log_probs, torch.tensor([[0, 0, 8]], dtype=torch.int32))
        graph = k2.ctc_graph([[1, 2, 2]], device=device)
        score = float(k2.intersect_dense(graph, dense, output_beam=1e10).get_tot_scores(True, True)[0])
    except Exception as error:  # whatever a binary for another torch may raise
        where = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
        remedy = "remedy: pip uninstall k2, then bash tools/install_k2.sh"
        print(f"k2 does not work with {where}: {error!r}\n{remedy}", file=sys.stderr)
        return 1
    lens, target = torch.tensor([8]), torch.tensor([[1, 2, 2]])
    loss = torch.nn.functional.ctc_loss(
        log_probs.cpu().transpose(0, 1), target, lens, torch.tensor([3]), reduction="sum"
    )
    if abs(score + float(loss)) > 1e-4:
        print(f"k2 gives the CTC score {score}, but torch {-float(loss)}", file=sys.stderr)
        return 1
    print(f"k2 works on {device}: torch {torch.__version__}, Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
