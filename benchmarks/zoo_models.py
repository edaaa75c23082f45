"""timm's module files with a small variant of each, or a few of different kinds; small networks first."""

FILES = """
mobilenetv3: lcnet_050 mobilenetv3_small_100 hardcorenas_a mobilenetv4_conv_small mobilenetv4_hybrid_medium
hardcorenas: hardcorenas_a
efficientnet: tinynet_e mobilenetv2_100 mnasnet_small efficientnet_b0 efficientnet_b0_gn efficientnet_cc_b0_4e mixnet_s
starnet: starnet_s1
repghost: repghostnet_050
regnet: regnety_002 regnetz_005
efficientvit_msra: efficientvit_m0
efficientvit_mit: efficientvit_b0
levit: levit_128s
ghostnet: ghostnet_100 ghostnetv2_100 ghostnetv3_050
edgenext: edgenext_xx_small
mobilevit: mobilevit_xxs mobilevitv2_050
shvit: shvit_s1
efficientvim: efficientvim_m1
efficientformer_v2: efficientformerv2_s0
fasternet: fasternet_t0
xcit: xcit_nano_12_p16_224
byobnet: mobileone_s0 repvgg_a0 gernet_s gcresnext26ts eca_resnext26ts
inception_next: inception_next_atto
convnext: convnext_atto convnextv2_atto convnext_atto_rms
swiftformer: swiftformer_xs
pvt_v2: pvt_v2_b0
fastvit: fastvit_t8
rexnet: rexnet_100
repvit: repvit_m0_9
dla: dla46x_c dla34
cspnext: cspnext_tiny
lcnetv2: lcnetv2_small
hgnet: hgnetv2_b0
iformer: iformer_t
lowformer: lowformer_b0
cpubone: cpubone_nano
csatv2: csatv2
mambaout: mambaout_femto
pit: pit_ti_224
deit: deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
vision_transformer: vit_tiny_patch16_224 vit_medium_patch16_gap_240
crossvit: crossvit_tiny_240
convit: convit_tiny
efficientformer: efficientformer_l1
tiny_vit: tiny_vit_5m_224
gcvit: gcvit_xxtiny
coat: coat_tiny
eva: eva02_tiny_patch14_224
vision_transformer_hybrid: vit_tiny_r_s16_p8_224
visformer: visformer_tiny
cait: cait_xxs24_224
mlp_mixer: mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224
maxxvit: maxvit_pico_rw_256 coatnet_pico_rw_224
metaformer: poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18
resnet: resnet18 resnet50 resnext50_32x4d ecaresnet26t seresnext26t_32x4d
senet: legacy_seresnet18 legacy_seresnext26_32x4d
sknet: skresnet18
resnest: resnest14d
resnetv2: resnetv2_18 resnetv2_50x1_bit
res2net: res2net50_26w_4s
selecsls: selecsls42b
vovnet: ese_vovnet19b_slim_dw ese_vovnet19b_dw
dpn: dpn48b dpn68
densenet: densenet121
cspnet: cspresnet50 cs3darknet_s
hrnet: hrnet_w18_small
tresnet: tresnet_m
nfnet: nfnet_l0 nf_regnet_b0
byoanet: botnet26t_256 halonet26t lambda_resnet26t eca_botnext26ts_256
vision_transformer_relpos: vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
swin_transformer: swin_tiny_patch4_window7_224
swin_transformer_v2: swinv2_tiny_window8_256
swin_transformer_v2_cr: swinv2_cr_tiny_224
davit: davit_tiny
focalnet: focalnet_tiny_srf
hiera: hiera_tiny_224
mvitv2: mvitv2_tiny
nest: nest_tiny
nextvit: nextvit_small
rdnet: rdnet_tiny
sequencer: sequencer2d_s
tnt: tnt_s_patch16_224
twins: twins_pcpvt_small twins_svt_small
vitamin: vitamin_small_224
volo: volo_d1_224
xception: legacy_xception
xception_aligned: xception41
inception_v3: inception_v3
inception_v4: inception_v4
inception_resnet_v2: inception_resnet_v2
vgg: vgg11_bn vgg11
convmixer: convmixer_1024_20_ks9_p14
hieradet_sam2: hieradet_small
naflexvit: naflexvit_base_patch16_gap
beit: beit_base_patch16_224
vision_transformer_sam: samvit_base_patch16_224
gemma4_vit: gemma4_vit_167m
qwen3_vit: qwen3_vit_88m
deepseek_vit: deepseek_vit_412m
mobilenetv5: mobilenetv5_300m
nasnet: nasnetalarge
pnasnet: pnasnet5large
"""
MODELS = {name: line.split(":")[0] for line in FILES.split("\n") if line for name in line.split(":")[1].split()}
"""Per model the file that it comes from."""
