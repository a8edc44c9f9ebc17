"""Train a regressor from images to the embeddings of their prompts.

python train.py                                              draws pairs and trains the demo, on a CPU
python train.py +experiment=vit_h data=kaggle data.root=DIR  fine-tunes CLIP ViT-H/14 on your pairs
python train.py -m seed=0,1,2                                a sweep
python train.py dry_run=true                                 prints the plan and stops
python train.py --help                                       every key
"""

from img2prompt.commands.door import main

if __name__ == "__main__":
    main("train")
