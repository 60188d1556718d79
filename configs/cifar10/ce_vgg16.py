# VGG-16 on CIFAR-10 with CE after every norm. Options as in vgg16.py, and
#   share       model.backbone.ce_share=0.75, or 0.5 (section 5.3)
#   location    model.backbone.ce_position=before: conv, CE, norm, ReLU (section 5.3)
#   branch      model.backbone.ce_cfg.bd_ratio=1.0: BD alone; 0.0: IR alone
_base_ = './vgg16.py'

model = dict(backbone=dict(type='CEVGG', ce_cfg=dict(type='CE')))
